"""The pages under /ui/: chat, dashboard, audit records, documents. They ask the same API as any other client."""
