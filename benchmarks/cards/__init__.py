"""What ``method_cards`` measures, by kinds of methods."""
