/* What tests/test_c_code.py compiles. */

int add(int a, int b)
{
    int sum = 0;
#pragma omp parallel for reduction(+ : sum)
    for (int i = 0; i < 2; i++) sum += i ? a : b;
    return sum;
}
