"""What lies underneath and knows no network: arrays on a device, random numbers, files, errors, command lines."""
