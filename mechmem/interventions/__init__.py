"""The interventions: one file each, their controls in a subpackage, and applied()."""
