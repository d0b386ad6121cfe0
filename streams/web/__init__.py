"""The console: files a browser loads, nothing from elsewhere."""
