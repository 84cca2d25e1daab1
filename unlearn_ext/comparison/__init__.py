"""Methods side by side: from the same weights, on the same digits, each judged against retrained models."""
