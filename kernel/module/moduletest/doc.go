// SPDX-License-Identifier: BSD-2-Clause

// Package moduletest holds the tests of the kernel module dm-dsync against its
// own interface: the table, the messages and the files in /proc, as
// ../dm-dsync.rst describes them. They run as root in a guest that has the
// module; systemtest/vm boots one for each kernel. Elsewhere they skip.
package moduletest
