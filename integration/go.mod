module sallyport/integration

go 1.26.0

require sallyport v0.0.0

require golang.org/x/net v0.60.0 // indirect

replace sallyport => ../
