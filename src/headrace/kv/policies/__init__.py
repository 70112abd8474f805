"""KV policies: one file each, named as the policy is chosen."""
