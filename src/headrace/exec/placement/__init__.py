"""Methods that place weights and KV pages in memory and on disk: one file each, named as chosen."""
