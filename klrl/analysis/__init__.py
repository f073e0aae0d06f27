"""What people look at after training: reports, comparisons, figures, videos."""
