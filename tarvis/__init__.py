"""TarViS: one network for every task that segments targets in video."""
