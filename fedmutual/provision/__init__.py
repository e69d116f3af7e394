"""From one project file to a folder for the server and one for each site, ready to start."""
