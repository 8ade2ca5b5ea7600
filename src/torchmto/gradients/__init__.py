"""Which parameters are shared, the K x P matrix of their task gradients, and its reduction across ranks."""
