package main

import "os"

// terminate: Windows knows no gentler signal for another process.
var terminate = os.Kill
