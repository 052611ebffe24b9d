"""The batching engine: step(), scheduler, blocks, runners. It knows neither HTTP nor Ray."""
