"""Does the method pay? Every regime, baseline and ablation, measured on real paired data."""
