"""What a run costs: its workers' time, its money, its budget."""
