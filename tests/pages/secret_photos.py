"""What photos that must not be shown hold, and an id that no file can have."""

SECRET = b"what nobody outside of this folder may see"
LONG = "x" * 300
