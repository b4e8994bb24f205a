"""The interventions: one file each, their controls beneath, and applied()."""
