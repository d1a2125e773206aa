"""Define the content of photos that must not be shown, and an id too long for a file name."""

SECRET = b"what nobody outside of this folder may see"
LONG = "x" * 300
