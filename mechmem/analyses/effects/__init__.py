"""What interventions do to the answers."""
