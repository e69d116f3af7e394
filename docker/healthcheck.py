"""Exit 0 if a Flower process answers at URL/health; the container's health check.

python healthcheck.py URL [CA]
"""

import ssl
import sys
import urllib.request

url, ca = sys.argv[1], sys.argv[2:]
context = ssl.create_default_context(cafile=ca[0]) if ca else None
opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
)
opener.open(f"{url}/health", timeout=5).close()
