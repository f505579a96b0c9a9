"""What gets signed: one module per artifact, which knows keys only by the Protocols of `tokens`."""
