"""The launcher's view of a run: metrics, messages, TensorBoard, MLflow."""
