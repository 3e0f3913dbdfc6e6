"""Planning: from facts and options to a complete plan; nothing is written here."""
