"""Code that runs only inside a token worker: the one place where a driver is loaded and a PIN is known."""
