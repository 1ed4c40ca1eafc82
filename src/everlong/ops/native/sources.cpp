// The fingerprint of the sources that this library was built from, which setup.py hands to the compiler.
extern "C" const char *ev_sources() { return EV_SOURCES; }
