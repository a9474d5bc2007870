"""Where every tensor is placed, and what that costs: bytes, collectives, pictures. Pure."""
