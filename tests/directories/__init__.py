"""Directory targets: races, crashes and hostile receipts."""
