// Windows of an accelerometer with three analog outputs, such as an ADXL335, for a bundle whose input is 3 x 128.
//
// Each window is sent when it is whole. That takes 70 ms at 115200 baud, in which no sample is taken, so windows do not join; boards with USB of their
// own need a few milliseconds. Where they must join, send single samples as lines of text instead (docs/sources.md).

#include <edgeadapt_frame.h>

static const uint8_t PINS[] = {A0, A1, A2};
static const uint16_t DIMS[] = {3, 128}; // channels, samples
static const float SCALE = 0.01f;        // of the values sent: hundredths of m/s2
static const uint32_t PERIOD = 20000;    // microseconds from one sample to the next

static int16_t window[3][128];
static edgeadapt_sender sender;

static void sendBytes(void *, const uint8_t *data, size_t size) { Serial.write(data, size); }

// 330 mV for each g around half of 3.3 V, measured in 1024 steps
static int16_t measured(uint8_t pin) { return (int16_t)((analogRead(pin) - 512) * 981L / 102); }

void setup() {
  Serial.begin(115200);
  // The lowest bits of a pin that nothing is connected to are noise, which makes a number that differs from start to start.
  uint16_t boot = 0;
  for (int bit = 0; bit < 16; bit++) boot = (uint16_t)(boot << 1 | (analogRead(A3) & 1));
  edgeadapt_start(&sender, sendBytes, NULL, boot);
}

void loop() {
  uint32_t due = micros();
  for (uint16_t at = 0; at < DIMS[1]; at++) {
    while ((int32_t)(micros() - due) < 0) {
    }
    due += PERIOD;
    for (uint8_t channel = 0; channel < DIMS[0]; channel++) window[channel][at] = measured(PINS[channel]);
  }
  edgeadapt_begin(&sender, EDGEADAPT_INT16, EDGEADAPT_UNKNOWN, SCALE, 2, DIMS);
  for (uint16_t channel = 0; channel < DIMS[0]; channel++)
    for (uint16_t at = 0; at < DIMS[1]; at++) edgeadapt_add_int16(&sender, window[channel][at]);
  edgeadapt_end(&sender);
}
