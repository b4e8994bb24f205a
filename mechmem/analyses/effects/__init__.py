"""Effects of interventions on the answers."""
