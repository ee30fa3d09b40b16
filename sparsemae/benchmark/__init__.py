"""What our models and our training cost, measured beside what people would otherwise use."""
