"""What serves CPUs alone: memory that is kept, products as plain matrices, quick random bits."""
