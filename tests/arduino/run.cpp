// Runs a sketch for three rounds.
#include "Arduino.h"

#include SKETCH

int main() {
  setup();
  for (int round = 0; round < 3; round++) loop();
  return 0;
}
