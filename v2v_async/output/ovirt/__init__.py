"""What belongs to oVirt and RHV: their OVF, their storage domains, their API."""
