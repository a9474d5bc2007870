"""Where every tensor is placed, and what that costs: bytes, collectives, forecasts, pictures. Pure."""
