print_footprint = render_footprint = None
