"""What an audit draws, keeps and shows."""
