"""From facts and options to a complete plan; pure, nothing is read or written here."""
