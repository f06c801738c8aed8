// The second weight type of a kernel that reads two: the files that depend on the type follow once more, in a namespace
// that ends where the next file begins.
//
//   Q6K_SECOND_*  the second type's macros

#undef Q6K_BITS
#undef Q6K_OFFSET
#undef Q6K_BOOK
#undef Q6K_GROUP
#undef Q6K_MINIMUM
#undef Q6K_SCALES
#undef CODE_TYPE
#define Q6K_BITS Q6K_SECOND_BITS
#define Q6K_OFFSET Q6K_SECOND_OFFSET
#define Q6K_BOOK Q6K_SECOND_BOOK
#define Q6K_GROUP Q6K_SECOND_GROUP
#define Q6K_MINIMUM Q6K_SECOND_MINIMUM
#define Q6K_SCALES Q6K_SECOND_SCALES

namespace second {

