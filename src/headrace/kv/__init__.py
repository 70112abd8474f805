"""Where KV bytes live."""
