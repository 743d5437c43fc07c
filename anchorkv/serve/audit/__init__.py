"""The audit trail: for every answer a record in an append-only, hash-chained table. Knows no HTTP and no engine."""
