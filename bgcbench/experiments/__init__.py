"""One file a command: a frozen configuration and a run that yields rows."""
