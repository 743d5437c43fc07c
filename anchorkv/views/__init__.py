"""What a ledger looks like to a person: on a terminal, and as a web page."""
