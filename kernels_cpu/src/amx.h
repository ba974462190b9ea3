// Whether this process may use AMX's tiles, and they give what they should.
#pragma once

namespace tinychat {

// Asks the operating system for the tiles and tries them, once.
//   null  they work;  ""  this CPU has none;  else why they are not used
const char* amx_problem();

}  // namespace tinychat
