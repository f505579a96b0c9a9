"""Where keys live. Knows nothing of HTTP or of artifact formats; imports no backend."""
