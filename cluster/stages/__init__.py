"""A stage as a Ray job: started, followed, and its log kept."""
