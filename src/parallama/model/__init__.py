"""What a config means: families, sizes, rotary settings, and what is refused. Pure."""
