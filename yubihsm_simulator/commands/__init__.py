"""The commands that a session can carry, one family a module; `table` lists them all."""
