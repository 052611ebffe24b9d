"""What an exported or pushed model says of itself: its bill of materials and its card."""
