"""The self-contained page and the charts that studies, anatomy and growth share."""
