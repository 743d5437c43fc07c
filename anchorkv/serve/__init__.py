"""The server: many sessions on one engine, its gate, watch, fallback, audit and pages."""
