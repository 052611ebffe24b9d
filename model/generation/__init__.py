"""From logits to tokens: the rules by which a token is drawn, and the plain generator."""
