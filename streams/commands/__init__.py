"""One module per command group: light imports at the top, heavy ones inside the commands."""
